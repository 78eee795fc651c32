"""The benchmarks behind ``fastgpt bench``.

``workloads`` says what is measured (tables of data), ``baselines`` what torch ships for the same
call, ``harness`` verifies and times, ``machine`` says where, ``report`` keeps and shows the result.
"""

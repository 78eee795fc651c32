"""The proof of parity behind ``fastgpt verify``, and the tables and the rule that fastgpt's own tests have.

A file per op has a table of cases and computes each of them three times, ``rule`` judges the results, ``run``
goes through all of them.
"""

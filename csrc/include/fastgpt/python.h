// How the native modules read torch's tensors without torch's headers: as any Python objects with data_ptr(),
// shape, stride() and dtype, which the Python side has checked.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "fastgpt/params.h"

namespace py = pybind11;

namespace fastgpt {

// The dtypes that a kernel may be given, and their names in torch.
enum class Element { f32, bf16, f16, boolean, int8, e4m3 };
inline const char* const kElementNames[] = {"float32", "bfloat16", "float16",
                                            "bool",    "int8",     "float8_e4m3fn"};
inline PyObject* element_objects[std::size(kElementNames)];
inline PyObject *tensor_type, *parameter_type, *strided;

// Before the first tensor is passed.
inline void find_elements() {
  py::module_ torch = py::module_::import("torch");
  for (size_t i = 0; i < std::size(kElementNames); i++)
    element_objects[i] = py::object(torch.attr(kElementNames[i])).release().ptr();
  tensor_type = py::object(torch.attr("Tensor")).release().ptr();
  parameter_type = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
  strided = py::object(torch.attr("strided")).release().ptr();
}

// What a call of the Python API returned, given up when the scope ends.
inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Whether a tensor's memory, sizes and strides are all there is to it: no subclass, of the CPU, dense, not
// negated when it is read.
inline bool is_plain(py::handle t) {
  static PyObject* const names[] = {
      PyUnicode_InternFromString("is_cpu"), PyUnicode_InternFromString("is_nested"),
      PyUnicode_InternFromString("layout"), PyUnicode_InternFromString("is_neg")};
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
  if (type != tensor_type && type != parameter_type) return false;
  return checked(PyObject_GetAttr(t.ptr(), names[0])).ptr() == Py_True &&
         checked(PyObject_GetAttr(t.ptr(), names[1])).ptr() == Py_False &&
         checked(PyObject_GetAttr(t.ptr(), names[2])).ptr() == strided &&
         checked(PyObject_CallMethodNoArgs(t.ptr(), names[3])).ptr() == Py_False;
}

// A tensor of which the rest is known: its memory, null for None and where it has no elements.
struct Data {
  py::handle object;  // none for None
  void* address = nullptr;

  template <class T>
  operator T*() const {
    return static_cast<T*>(address);
  }
  Element element() const {
    if (!object) throw py::type_error("got None, expected a tensor");
    py::object dtype = checked(PyObject_GetAttrString(object.ptr(), "dtype"));
    auto found = std::find(std::begin(element_objects), std::end(element_objects), dtype.ptr());
    if (found == std::end(element_objects))
      throw py::type_error("no kernel reads " + std::string(py::str(dtype)));
    return static_cast<Element>(found - std::begin(element_objects));
  }
  bool is(DType type) const {
    if (!object) return false;
    py::object dtype = checked(PyObject_GetAttrString(object.ptr(), "dtype"));
    return dtype.ptr() == element_objects[static_cast<int>(type)];
  }
  DType dtype() const {
    Element found = element();
    if (found > Element::f16) throw py::type_error("expected a tensor in float32, bfloat16 or float16");
    return static_cast<DType>(found);
  }
};

// A tensor of up to four axes; of none for None.
struct Array : Data {
  int64_t ndim = 0, sizes[4], strides[4];

  int64_t size(int64_t from_end) const { return sizes[ndim - from_end]; }
  int64_t stride(int64_t from_end) const { return strides[ndim - from_end]; }
};

static_assert(static_cast<int>(Element::bf16) == static_cast<int>(DType::bf16) &&
              static_cast<int>(Element::f16) == static_cast<int>(DType::f16) &&
              static_cast<int>(Element::boolean) == static_cast<int>(BiasType::boolean));

}  // namespace fastgpt

namespace pybind11::detail {

template <>
struct type_caster<fastgpt::Data> {
  PYBIND11_TYPE_CASTER(fastgpt::Data, const_name("torch.Tensor | None"));
  bool load(handle tensor, bool) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (tensor.is_none()) return true;
    object address = fastgpt::checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    value.address = PyLong_AsVoidPtr(address.ptr());
    if (PyErr_Occurred()) throw error_already_set();
    if (!value.address &&
        !fastgpt::checked(PyObject_CallMethod(tensor.ptr(), "numel", nullptr)).equal(int_(0)))
      throw type_error("got a tensor without memory");
    value.object = tensor;
    return true;
  }
};

template <>
struct type_caster<fastgpt::Array> {
  PYBIND11_TYPE_CASTER(fastgpt::Array, const_name("torch.Tensor | None"));
  bool load(handle tensor, bool convert) {
    static PyObject* const shape = PyUnicode_InternFromString("shape");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    make_caster<fastgpt::Data> data;
    data.load(tensor, convert);
    static_cast<fastgpt::Data&>(value) = cast_op<fastgpt::Data&>(data);
    if (tensor.is_none()) return true;
    object sizes = fastgpt::checked(PyObject_GetAttr(tensor.ptr(), shape));
    object strides = fastgpt::checked(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
    if (!PyTuple_Check(sizes.ptr()) || !PyTuple_Check(strides.ptr())) return false;
    value.ndim = PyTuple_GET_SIZE(sizes.ptr());
    if (value.ndim > 4 || PyTuple_GET_SIZE(strides.ptr()) != value.ndim) return false;
    for (int64_t axis = 0; axis < value.ndim; axis++) {
      value.sizes[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), axis));
      value.strides[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), axis));
    }
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail

namespace fastgpt {

// (batch, seq, head, dim) or, packed, (seq, head, dim).
inline Tensor tensor(const Array& t) {
  if (t.ndim == 0) return {};
  return {t.address, t.ndim == 4 ? t.strides[0] : 0, t.stride(3), t.stride(2)};
}

// (batch, head, seq) or, packed, (head, seq).
inline Tensor rows(const Array& t) {
  if (t.ndim == 0) return {};
  return {t.address, t.ndim == 3 ? t.strides[0] : 0, t.stride(1), t.stride(2)};
}

// Of (heads) or (batch, heads).
inline int64_t batch_stride(const Array& t) { return t.ndim == 2 ? t.strides[0] : 0; }

template <class T>
void read_bias(BiasTensor<T>& bias, const Array& t) {
  if (t.ndim == 0) return;
  bias.data = t;
  int64_t* const strides[] = {&bias.batch_stride, &bias.head_stride, &bias.query_stride, &bias.key_stride};
  for (int axis = 0; axis < 4; axis++) *strides[axis] = t.sizes[axis] == 1 ? 0 : t.strides[axis];
}

}  // namespace fastgpt

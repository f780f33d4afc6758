// The pybind11 module neuroada_kernels._C: how the extension was built, the processor's instruction
// sets, and the index planner. It does not use torch: arrays are passed through the buffer protocol.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu_features.h"
#include "cpu/isa.h"
#include "neuroada/planner.h"

namespace py = pybind11;

namespace {

// The values of a one-dimensional buffer, which must hold exactly `count` int32 values.
int32_t* int32_values(const char* name, const py::buffer_info& info, int64_t count) {
  const char kind = info.format.empty() ? '\0' : info.format.back();
  if (info.itemsize != 4 || (kind != 'i' && kind != 'l') || info.ndim != 1 || info.size != count ||
      (count > 1 && info.strides[0] != 4)) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(info.size) + " elements of " +
                                std::to_string(info.itemsize) + " bytes, format '" + info.format + "', expected " +
                                std::to_string(count) + " contiguous int32 values");
  }
  return static_cast<int32_t*>(info.ptr);
}

// Returns d_out * k; throws if it exceeds the int32 range of the kernels' entries.
int64_t entries(int64_t d_out, int64_t k, int64_t d_in) {
  int64_t count = 0;
  if (d_out < 0 || k < 0 || d_in < 0 || __builtin_mul_overflow(d_out, k, &count) || count > INT32_MAX) {
    throw std::invalid_argument("index: sizes " + std::to_string(d_out) + ", " + std::to_string(k) + ", " +
                                std::to_string(d_in) + ", expected 0 or more, and fewer than 2^31 entries");
  }
  return count;
}

std::pair<int64_t, std::string> check_index(const py::buffer& index, int64_t d_out, int64_t k, int64_t d_in) {
  const py::buffer_info info = index.request();
  const int32_t* values = int32_values("index", info, entries(d_out, k, d_in));
  std::string error;
  const int64_t live = neuroada::check_index(values, d_out, k, d_in, error);
  return {live, error};
}

void plan_index(const py::buffer& index, int64_t d_out, int64_t k, int64_t d_in, const py::buffer& plan) {
  const py::buffer_info index_info = index.request(), plan_info = plan.request(/*writable=*/true);
  const int32_t* values = int32_values("index", index_info, entries(d_out, k, d_in));
  int64_t live = 0;
  for (int64_t e = 0; e < d_out * k; ++e) {
    if (values[e] < -1 || values[e] >= d_in) {
      throw std::invalid_argument("index: column " + std::to_string(values[e]) + " is out of range for a weight with " +
                                  std::to_string(d_in) + " inputs");
    }
    live += values[e] >= 0;
  }
  neuroada::plan_index(values, d_out, k, d_in, int32_values("plan", plan_info, neuroada::plan_size(d_in, live)));
}

void order_slots(const py::buffer& index, int64_t d_out, int64_t k) {
  const py::buffer_info info = index.request(/*writable=*/true);
  neuroada::order_slots(int32_values("index", info, entries(d_out, k, 0)), d_out, k);
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = NEUROADA_VERSION;
  facts["compiler"] = NEUROADA_COMPILER;
  facts["flags"] = NEUROADA_FLAGS;
  facts["build_type"] = NEUROADA_BUILD_TYPE;
  facts["torch"] = NEUROADA_TORCH_VERSION;
  facts["instruction_sets"] = NEUROADA_ISAS;
  facts["cuda_archs"] = NEUROADA_CUDA_ARCHS;
  facts["nvcc"] = NEUROADA_NVCC_VERSION;
  facts["cutlass"] = NEUROADA_CUTLASS_VERSION;
  return facts;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
  if (neuroada::cpu::has_avx2()) features.push_back("avx2");
  if (neuroada::cpu::has_avx512()) features.push_back("avx512");
  if (neuroada::cpu::has_avx512_bf16()) features.push_back("avx512_bf16");
  if (neuroada::cpu::isa_runs("amx_bf16")) features.push_back("amx_bf16");  // depends on the compiler
#if defined(__aarch64__)
  features.push_back("neon");
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts, CPU features and the index planner of neuroada_kernels.";
  m.def("build_facts", &build_facts, "How the extension was built.");
  m.def("cpu_features", &cpu_features, "The instruction sets with kernels that this processor runs.");
  m.def("cpu_vendor", &neuroada::cpu::vendor, "\"intel\", \"amd\", or \"\" for any other.");
  m.def(
      "cpu_isa", [] { return std::string(neuroada::cpu::chosen_isa()); },
      "The instruction set whose kernels run; raises where NEUROADA_CPU_ISA names one that cannot.");
  m.def("check_index", &check_index, "The number of connections and an error text, empty if valid.", py::arg("index"),
        py::arg("d_out"), py::arg("k"), py::arg("d_in"));
  m.def("plan_index", &plan_index, "Writes the plan of an index into plan.", py::arg("index"), py::arg("d_out"),
        py::arg("k"), py::arg("d_in"), py::arg("plan"));
  m.def("order_slots", &order_slots, "Permutes the rows of index for gathers on a GPU.", py::arg("index"),
        py::arg("d_out"), py::arg("k"));
}

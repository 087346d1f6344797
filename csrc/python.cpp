// pybind11 module: what takes no tensors.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/product.h"
#include "cpu/release.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and instruction-set control of libglm4v_ops.so.";
  m.def("build_facts", [] {
    py::dict facts;
    facts["version"] = GLM4V_VERSION;
    facts["compiler"] = GLM4V_COMPILER;
    facts["cpu_archs"] = GLM4V_ISA_LEVELS;
    facts["cuda"] = *GLM4V_NVCC_VERSION != '\0';
    facts["cuda_archs"] = GLM4V_CUDA_ARCHS;
    facts["nvcc"] = GLM4V_NVCC_VERSION;
    facts["isa"] = glm4v::active_isa_name();
    py::dict products;
    for (const char* dtype : {"fp32", "bf16", "fp16"}) products[dtype] = glm4v::product_name(dtype);
    facts["products"] = products;
    return facts;
  });
  m.def("best_isa", &glm4v::best_isa_name, "Best instruction-set level of this machine.");
  m.def("force_isa", &glm4v::force_isa, py::arg("level"), "Forces a level, for tests; ValueError where it is missing.");
  m.def("measure_peak", &glm4v::measure_peak, py::arg("kind"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "GFLOP/s of fp32, bf16_dot or amx at the active level, for benchmarks; 0 where the level lacks it.");
  m.def("force_product", &glm4v::force_product, py::arg("dtype"), py::arg("name"),
        "Matrix products of fp32, bf16 or fp16 by F.linear or glm4v_ext, of fp32 and bf16 also by glm4v_ext on tiles "
        "where the CPU has AMX; ValueError for other names.");
  m.def("release_kept_memory", &glm4v::release_kept_memory,
        "Gives the memory that is kept of large dead outputs back to the system.");
}

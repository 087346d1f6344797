// Included before every glue file: what it registers for CUDA serves the CPU.
#pragma once
#include <torch/csrc/stable/library.h>
#define CUDA CPU

// What a tensor map of the emulator says; strides in bytes.
#pragma once
#include <cuda_runtime_api.h>

struct CUtensorMap {
  const unsigned char* base;
  int64_t rows, row_stride, sequences, sequence_stride;
  int row_bytes, box_rows;
  bool first_atom_checked;
};

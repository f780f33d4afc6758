// A GEMM that accumulates into its output: its operands by their roles, and checks of them.
#pragma once

#include "operand_sm90.h"

namespace neuroada::cuda {

// onto [left.rows, onto.columns] += left right + bias, where right is the weight [onto.columns, left.columns] or, with
// rows_of_right, [left.columns, onto.columns].
struct OntoOperands {
  Operand left, weight, onto;
  bool rows_of_right;
};

inline OntoOperands onto_operands(const ProductOnto& p, bool forward) {
  return {{forward ? "x" : "grad", p.from, p.tokens, forward ? p.d_in : p.d_out, p.from_stride},
          {"weight", p.weight, p.d_out, p.d_in, p.weight_stride},
          {"onto", p.onto, p.tokens, forward ? p.d_out : p.d_in, p.onto_stride},
          !forward};
}

inline OntoOperands checked_onto_operands(const char* kernel, const ProductOnto& p, bool forward) {
  const OntoOperands operands = onto_operands(p, forward);
  check_copyable(kernel, operands.left);
  check_copyable(kernel, operands.weight);
  check_copyable(kernel, operands.onto);
  return operands;
}

}  // namespace neuroada::cuda

// The private op namespace neuroada_C. One schema serves every device; the kernels of a device register
// themselves in <device>/ops. The public ops live in Python, in namespace neuroada.
#include "neuroada/schemas.h"

STABLE_TORCH_LIBRARY(neuroada_C, m) { neuroada::define_ops(m); }

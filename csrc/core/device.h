// Which folder computes a call: by the device of its tensors. A build without CUDA has no sl_cuda_ functions,
// and its checks refuse CUDA tensors before anyone gets here.
#ifndef SL_DEVICE_H
#define SL_DEVICE_H

#include "tensor.h"

#ifdef SL_WITH_CUDA
#define SL_BY_DEVICE(tensor, on_cuda, on_cpu) ((tensor)->device_type == SL_DEVICE_CUDA ? (on_cuda) : (on_cpu))
#else
#define SL_BY_DEVICE(tensor, on_cuda, on_cpu) (on_cpu)
#endif

#endif

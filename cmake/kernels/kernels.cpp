// The one file in which the kernels are instantiated.
#define COTERIE_INSTANTIATE_KERNELS
#include <coterie/kernel/dispatch.hpp>

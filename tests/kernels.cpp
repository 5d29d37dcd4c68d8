// The one file in which the kernels are instantiated.
#if __has_include(<coterie/kernel/dispatch.hpp>)
#define COTERIE_INSTANTIATE_KERNELS
#include <coterie/kernel/dispatch.hpp>
#endif

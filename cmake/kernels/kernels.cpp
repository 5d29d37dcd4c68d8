// The one file in which the kernels are instantiated.
#define COTERIE_INSTANTIATE_KERNELS
#include <coterie/kernel/backward.hpp>
#include <coterie/kernel/exponentials.hpp>
#include <coterie/kernel/forward.hpp>
#include <coterie/kernel/int8_keys.hpp>
#include <coterie/kernel/nearest.hpp>
#include <coterie/kernel/product.hpp>

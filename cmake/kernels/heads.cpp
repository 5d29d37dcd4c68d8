// The one file in which the heads of layers are instantiated.
#define COTERIE_INSTANTIATE_HEADS
#include <coterie/layer/heads_pass.hpp>

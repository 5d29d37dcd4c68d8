// All of Coterie. Files that use one room of it compile faster with that room's header alone.
#pragma once

#include "coterie/attention/attention.hpp"
#include "coterie/attention/relative_bias.hpp"
#include "coterie/core/context.hpp"
#include "coterie/kernel/positions.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "coterie/plan/clustered.hpp"
#include "coterie/plan/dense.hpp"
#include "coterie/plan/local.hpp"
#include "coterie/plan/strided.hpp"
#include "coterie/router/commitment.hpp"
#include "coterie/router/kmeans.hpp"
#include "coterie/version.hpp"

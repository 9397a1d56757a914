// The argument blocks of all kernels.
#pragma once
#include "attention_call.h"
#include "compressor_call.h"
#include "embedding_call.h"
#include "hyper_connection_call.h"
#include "indexer_call.h"
#include "linear_call.h"
#include "moe_call.h"
#include "norm_call.h"
#include "projection_call.h"
#include "residency_call.h"
#include "rope_call.h"
#include "sample_call.h"

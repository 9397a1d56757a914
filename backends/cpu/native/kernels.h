// All kernels of one level. A level's file defines its name and its instructions, then includes this inside its namespace. The texts
// use nothing of the standard library: an inline function that two levels share could be taken from the one this processor lacks.
#include "simd.h"
#include "rows.h"
#include "gemv_f32.h"
#if defined(V4_BF16)
#include "gemv_bf16.h"
#endif
#include "product.h"
#include "rope.h"
#include "cache.h"
#include "linear.h"
#include "norm.h"
#include "hyper_connection.h"
#include "embedding.h"
#include "sample.h"
#include "projection.h"
#include "compressor.h"
#include "moe.h"
#include "attention.h"
#include "indexer.h"
#include "residency_kernel.h"

#define V4_KERNEL(body, Layout, Call) {#body, body, scratch_of<Layout, Call>, sizeof(Call)}
#define V4_KERNEL_WITHOUT_SCRATCH(body, Call) {#body, body, nullptr, sizeof(Call)}
extern const Kernel kernels[];
const Kernel kernels[] = {
    V4_KERNEL(linear, LinearLayout, LinearCall),
    V4_KERNEL(rms_norm, NormLayout, NormCall),
    V4_KERNEL(hyper, HyperLayout, HyperCall),
    V4_KERNEL_WITHOUT_SCRATCH(rope_table, RopeTableCall),
    V4_KERNEL_WITHOUT_SCRATCH(feed, FeedCall),
    V4_KERNEL_WITHOUT_SCRATCH(embed, EmbedCall),
    V4_KERNEL(sample, SampleLayout, SampleCall),
    V4_KERNEL(q_project, QueryLayout, QueryCall),
    V4_KERNEL(kv_project_store, KvLayout, KvCall),
    V4_KERNEL(grouped_out, OutputLayout, OutputCall),
    V4_KERNEL(compress, CompressLayout, CompressCall),
    V4_KERNEL(index_query, IndexQueryLayout, IndexQueryCall),
    V4_KERNEL(sparse_attn, AttentionLayout, AttentionCall),
    V4_KERNEL(index_topk, IndexLayout, IndexCall),
    V4_KERNEL(route, RouteLayout, RouteCall),
    V4_KERNEL(routed_experts, ExpertsLayout, ExpertsCall),
    V4_KERNEL_WITHOUT_SCRATCH(residency, ResidencyCall),
    {nullptr, nullptr, nullptr, 0},
};

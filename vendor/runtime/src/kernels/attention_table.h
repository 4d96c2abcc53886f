// The attention kernels of every instruction set, for dispatch and for tests.
#pragma once

#include "base/cpu.h"
#include "kernels/attention.h"

namespace qi::kernels {

// One function per function of attention.h that depends on the level.
struct AttentionOps {
    void (*kv_store)(Type kv_type, int64_t head_dim, int slot, const float* key, const float* value,
                     std::byte* head_page);
    void (*attend)(const AttentionArgs& args, std::byte* scratch);
};

// nullptr when this build has no kernels of that level.
const AttentionOps* attention_ops_for(Isa isa);

namespace portable {
extern const AttentionOps attention_ops;
}
namespace avx2 {
extern const AttentionOps attention_ops;
}
namespace avx512 {
extern const AttentionOps attention_ops;
}
namespace neon {
extern const AttentionOps attention_ops;
}

}  // namespace qi::kernels

#include <cstddef>
#include <cstdint>

#include "calls.h"

namespace v4 {
namespace scalar {
#include "kernels.h"
}
}  // namespace v4

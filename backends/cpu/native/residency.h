// Which routed experts are in memory: a bounded cache over mapped files, least recently used first out. A unit is one expert of one
// layer. Nothing is copied: reading means asking the system for a unit's pages, evicting means giving them back.
#pragma once
#include <cstddef>
#include <cstdint>

namespace v4 {

struct Residency;

// Makes the chosen experts of a layer resident: evicts beyond the budget, starts reading all that is missing, then waits for it.
// Ids outside the layer are passed over. Allocates nothing.
void residency_need(Residency* residency, std::int64_t layer, const std::int32_t* ids, std::int64_t count);

}  // namespace v4

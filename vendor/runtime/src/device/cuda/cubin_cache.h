// Cubins on disk: one file each, named after what it was made from, with a checksum.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "base/sha256.h"

namespace qi::cuda {

// The entry of that key, or nothing. A damaged one is said in the log and counts as absent.
std::vector<std::byte> read_cached_cubin(const std::string& folder, const Sha256& key);

// Keeps an entry; a folder that cannot be written is said in the log once, and is no failure.
void write_cached_cubin(const std::string& folder, const Sha256& key,
                        std::span<const std::byte> cubin);

}  // namespace qi::cuda

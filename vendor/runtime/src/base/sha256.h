// SHA-256 (FIPS 180-4), for names and checksums of what is kept on disk.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace qi {

using Sha256 = std::array<uint8_t, 32>;

class Sha256Stream {
  public:
    void update(std::span<const std::byte> bytes);
    void update(std::string_view text) { update(std::as_bytes(std::span(text))); }
    // Ends the message; the object is not to be used afterwards.
    Sha256 finish();

  private:
    void compress(const uint8_t* block);

    std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> block_{};  // not yet full
    uint64_t n_bytes_ = 0;             // of the message so far
};

Sha256 sha256(std::span<const std::byte> bytes);
std::string hex(const Sha256& digest);

}  // namespace qi

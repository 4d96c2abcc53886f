// SHA-256 against the standard's examples, whole and in pieces.
#include "base/sha256.h"

#include <cassert>
#include <string>

using namespace qi;

static std::string digest_of(std::string_view text, size_t piece) {
    Sha256Stream stream;
    for (size_t at = 0; at < text.size(); at += piece)
        stream.update(text.substr(at, piece));
    return hex(stream.finish());
}

int main() {
    const struct {
        std::string text;
        const char* digest;
    } known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {std::string(1000000, 'a'),
         "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    for (const auto& k : known) {
        assert(hex(sha256(std::as_bytes(std::span(k.text)))) == k.digest);
        for (const size_t piece : {1, 3, 55, 56, 63, 64, 65, 4096})
            assert(digest_of(k.text, piece) == k.digest);
    }
    // Every length around a block's end pads without reading or losing a byte.
    for (size_t n = 0; n < 200; n++) {
        const std::string text(n, 'x');
        assert(digest_of(text, 1) == hex(sha256(std::as_bytes(std::span(text)))));
    }
}

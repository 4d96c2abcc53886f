// What a qi_gguf handle holds.
#pragma once

#include <memory>

#include "gguf/file.h"

struct qi_gguf {
    std::shared_ptr<const qi::gguf::File> file;
};

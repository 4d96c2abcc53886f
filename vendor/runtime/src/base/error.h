// The runtime's one exception type, and how it becomes a message.
#pragma once

#include <cstdarg>
#include <stdexcept>
#include <string>

#include "qinfer.h"

namespace qi {

// printf-style formatting into a string; never fails, cuts nothing.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...);

// Thrown inside the runtime only; the C boundary turns it into a status and a message.
class Error : public std::runtime_error {
  public:
    Error(qi_status status, const std::string& message)
        : std::runtime_error(message), status_(status) {}
    qi_status status() const { return status_; }

  private:
    qi_status status_;
};

// throw Error(status, format(...)), in one call.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(qi_status status, const char* pattern, ...);

}  // namespace qi

// Log lines wait in a bounded ring until Python drains them; the runtime itself never prints.
#pragma once

#include <string>

namespace qi {

enum class LogLevel : int { debug = 10, info = 20, warning = 30, error = 40 };

// Appends a line; when the ring is full the oldest line gives way. Safe from any thread.
void log(LogLevel level, std::string text);

// Takes the oldest line out; false when there is none.
bool next_log_line(LogLevel& level, std::string& text);

}  // namespace qi

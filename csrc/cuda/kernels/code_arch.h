// Which of the code in this library a GPU runs, from the list of architectures that it was built for (setup.py).
#pragma once

#include <algorithm>
#include <string>

namespace sq {

struct CodeArch {
  int arch;          // 80 for sm_80 or compute_80; 0: there is none
  bool is_specific;  // made for this architecture alone: an "a" behind its number
};

// archs: such as "80+PTX 89 90a". Machine code runs on its own major version from its minor version on, with an "a" on
// that one architecture; PTX, which the driver compiles, on everything newer, if there is no machine code.
inline CodeArch code_arch(const std::string& archs, int arch) {
  CodeArch machine{0, false}, ptx{0, false};
  for (size_t begin = 0; begin < archs.size();) {
    const size_t end = std::min(archs.find(' ', begin), archs.size());
    const std::string item = archs.substr(begin, end - begin);
    begin = end + 1;
    const size_t digits = item.find_first_not_of("0123456789");
    const int built = std::stoi("0" + item.substr(0, digits));
    const char feature = digits < item.size() ? item[digits] : ' ';
    const bool is_specific = feature == 'a';
    const bool runs = is_specific ? built == arch : built / 10 == arch / 10 && built <= arch;
    if (runs && (built > machine.arch || (built == machine.arch && is_specific))) machine = {built, is_specific};
    if (feature == '+' && built <= arch && built > ptx.arch) ptx = {built, false};
  }
  return machine.arch != 0 ? machine : ptx;
}

}  // namespace sq

// ssd_scan forward as the recurrence it is defined by (ssd_mode "recurrent").
#pragma once

#include <statescan/dispatch.h>
#include <statescan/ssd_scan.h>

namespace statescan::ssd_scan {

inline constexpr int kRecurrentDstate = 256;  // at most

void launch_recurrent(const Args& args, const Dims& dims, Stream stream);

}  // namespace statescan::ssd_scan

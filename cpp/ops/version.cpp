#include <statescan/dispatch.h>

namespace statescan {

const char* version() { return STATESCAN_VERSION; }

}  // namespace statescan

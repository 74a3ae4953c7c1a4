// The context of a device in a thread.
#pragma once

namespace sq {

// Gives this thread the context of the device, which is current already as torch sees it. A thread that never called CUDA
// has none, and torch's guard calls nothing where the device is the one that it begins with; libraries that ask the driver
// then fail (pytorch#120131). Legal while a graph is captured; costs nothing but the first time.
void make_context(int device);

}  // namespace sq

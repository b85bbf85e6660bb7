"""From the device to host memory, while training goes on."""

"""Python runs this in replica servers that start with this folder on their path: their checksums take as long as was
chosen."""

import os
import time

from zlib_ng import zlib_ng

really = zlib_ng.crc32


def crc32(data, value=0):
    time.sleep(float(os.environ["SLOW_CHECKSUM_S_PER_MIB"]) * memoryview(data).nbytes / 2**20)
    return really(data, value)


zlib_ng.crc32 = crc32

"""CRC-32C (Castagnoli, RFC 3720 section 12.1) of arrays, in NumPy: about 0.2 GB/s on one core.

The message is cut into equal lanes that advance together byte by byte; then pairs of lanes are
joined, each join moving the left state over the right lane's length by one 32x32 matrix over
GF(2). L one entry a lane.
"""

import numpy as np

_POLYNOMIAL = 0x82F63B78


def crc32c(array: np.ndarray | bytes) -> int:
    """The checksum of an array's little-endian bytes (or of bytes) as an int below 2**32."""
    data = np.frombuffer(_little_endian_bytes(array), np.uint8)
    lanes = 1 << max(0, (len(data) // 1024).bit_length())
    length = max(4, -(-len(data) // lanes))
    padded = np.zeros(lanes * length, np.uint8)
    start = len(padded) - len(data)
    padded[start:] = data
    # The initial state of ones inverts the message's first four bytes; zeros before change nothing.
    head = padded[start : start + 4]
    head ^= 0xFF
    if len(head) < 4:
        return _short(data.tobytes())
    return int(_join(_advance(padded.reshape(lanes, length)), length)) ^ 0xFFFFFFFF


def _little_endian_bytes(array: np.ndarray | bytes) -> bytes:
    if isinstance(array, bytes):
        return array
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _short(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = (state >> 8) ^ int(_TABLE[(state ^ byte) & 0xFF])
    return state ^ 0xFFFFFFFF


def _advance(bytes_Ln: np.ndarray) -> np.ndarray:
    state_L = np.zeros(len(bytes_Ln), np.uint32)
    for byte_L in np.ascontiguousarray(bytes_Ln.T):
        state_L = (state_L >> 8) ^ _TABLE[(state_L ^ byte_L) & 0xFF]
    return state_L


def _join(state_L: np.ndarray, length: int) -> np.uint32:
    matrix = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(length):
        matrix = (matrix >> 8) ^ _TABLE[matrix & 0xFF]
    while len(state_L) > 1:
        state_L = _apply(matrix, state_L[0::2]) ^ state_L[1::2]
        matrix = _apply(matrix, matrix)
    return state_L[0]


def _apply(matrix: np.ndarray, state_L: np.ndarray) -> np.ndarray:
    bits = (state_L[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    return np.bitwise_xor.reduce(bits * matrix, axis=1)


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return table


_TABLE = _table()

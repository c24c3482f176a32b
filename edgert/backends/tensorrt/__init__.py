"""TensorRT engines on an NVIDIA GPU; nothing here has run on one yet (docs/tensorrt.md).

    cuda        the few calls of the CUDA runtime that are used, over cuda-bindings
    memory      how much memory, of what kind and for how long: plain arithmetic
    rectangles  a part of a tensor as a few two-dimensional copies
    device      one stream, what lives on it, and the order in which it is let go
    buffers     tensors on the device; those that the host shares
    arrays      arrays of the caller's that are on the device already
    log         what TensorRT says
    engine      the calls of TensorRT's runtime
    binding     an engine over its buffers: alternating sides, captured launches
    backend     the backend itself, and where its engines are found
    opening     driver, bindings and TensorRT, asked for in an order that never crashes

Importing any of them loads neither TensorRT nor cuda-bindings.
"""

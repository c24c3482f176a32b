"""From a bundle to TensorRT engines: a plan in plain Python, one adapter, a cache that is signed.

    target      what a device is: engines/*.toml
    operators   what each version of TensorRT parses
    shapes      a graph's nodes, and the memory its tensors take at given sizes
    plan        a bundle on a target: shape profiles, precision, memory, everything that is refused
    adapter     the plan on the `tensorrt` module that it is handed
    pipeline    `edgert build`: bundle to engines

Only `shapes` needs the onnx package, and only `pipeline` looks for TensorRT, when it is asked to
build. Nothing here imports torch.
"""

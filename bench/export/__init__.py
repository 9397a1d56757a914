"""The model as ONNX, and onnxruntime as a witness of its numbers."""

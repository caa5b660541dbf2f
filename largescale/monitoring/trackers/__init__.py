"""Where else a run is shown: TensorBoard, W&B, MLflow; one module for each."""

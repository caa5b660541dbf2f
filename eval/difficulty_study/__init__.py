"""The paper's study of denoising difficulty."""

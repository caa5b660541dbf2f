from tests.triton_kernels import bf16_products, compiled, touched  # noqa: F401

from tests.triton_kernels import bf16_products, compiled, touched  # noqa: F401
from tests.unit.foreign_weights import refused  # noqa: F401
from tests.unit.packed_pictures import images, truth  # noqa: F401

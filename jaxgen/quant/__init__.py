"""Weights: their protocol, the quantised kinds, how these are made, and the matrix products that read them."""

from jaxgen.quant.config import Int4Config as Int4Config
from jaxgen.quant.config import Quantization as Quantization
from jaxgen.quant.int4 import Int4 as Int4
from jaxgen.quant.int4 import int4_matmul as int4_matmul
from jaxgen.quant.int4 import quantize as quantize
from jaxgen.quant.lookup import Lookup4 as Lookup4
from jaxgen.quant.weight import Weight as Weight
from jaxgen.quant.weight import as_weight as as_weight

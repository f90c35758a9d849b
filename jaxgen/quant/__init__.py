"""Weights of four bits: the containers, how they are made, and the one matrix product that reads them."""

from jaxgen.quant.config import Int4Config as Int4Config
from jaxgen.quant.int4 import Int4 as Int4
from jaxgen.quant.int4 import quantize as quantize
from jaxgen.quant.lookup import Lookup4 as Lookup4
from jaxgen.quant.matmul import int4_matmul as int4_matmul

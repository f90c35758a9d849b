"""stub"""
class GenerationMixin:
    """stub"""

"""`u2label predict`: the trained panoptic model over photos, from the command line and as a call.

`load_predictor` and `predict_photos` are what other programs use; see there.
"""

from pipeline.predict.run import predict_photos
from pipeline.predict.weights import load_predictor

__all__ = ["load_predictor", "predict_photos"]

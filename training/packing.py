from models.cost import NetworkCost, measure_cost
from training.calibration import CalibrationRecord
from training.checkpoint import RunFolder
from training.objectives import network_of
from training.recipe import Recipe
import torch
def cost_of(folder: RunFolder, record: CalibrationRecord) -> NetworkCost:
    recipe = Recipe.model_validate(folder.read_description()["recipe"])
    with torch.device("meta"):
        network = network_of(recipe, len(record.class_names))
    return measure_cost(network, record.image_size_px)

import torch
from utils import factory
from utils.data_manager import DataManager


def train(args):
    args["device"] = [
        torch.device("cpu") if device == -1 else torch.device(f"cuda:{device}") for device in args["device"]
    ]
    data_manager = DataManager(args["dataset"], args["shuffle"], args["seed"][0], args["init_cls"], args["increment"])
    model = factory.get_model(args["model_name"], args)
    for _ in range(data_manager.nb_tasks):
        model.incremental_train(data_manager)
        model.after_task()

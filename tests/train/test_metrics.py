"""Metrics against their definitions, written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fer_models.metrics import Predictions, classification, confusion_matrix, paired_bootstrap, regression


def test_classification_by_hand():
    label, predicted = np.array([0, 0, 1, 1, 1, 2, -100]), np.array([0, 1, 1, 1, 0, 1, 2])
    matrix = confusion_matrix(label, predicted, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = classification(matrix)
    assert found["accuracy"] == 3 / 6
    assert found["mean_class_accuracy"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)  # class 3 does not occur
    f1 = [2 * 0.5 * 0.5 / 1, 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3), 0, 0]
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert classification(confusion_matrix(np.array([-1]), np.array([0]), 2)) == {}


@given(st.integers(3, 60), st.integers(0, 2**31))
def test_regression_by_numpy(count, seed):
    draws = np.random.default_rng(seed)
    true, predicted = draws.uniform(-1, 1, count), draws.uniform(-1.5, 1.5, count)
    predicted[0] = 0.0  # not all beyond 1, where clipping leaves nothing that varies
    found = regression(predicted, true)
    x = predicted.clip(-1, 1)
    rho = np.corrcoef(x, true)[0, 1]
    assert found["pcc"] == pytest.approx(rho)
    ccc = 2 * rho * x.std() * true.std() / (x.var() + true.var() + (x.mean() - true.mean()) ** 2)
    assert found["ccc"] == pytest.approx(ccc)
    assert found["rmse"] == pytest.approx(np.sqrt(((x - true) ** 2).mean()))
    assert found["sagr"] == (np.sign(x) == np.sign(true)).mean()


def test_regression_leaves_out_the_unknown():
    true = np.array([0.5, np.nan, -0.5])
    assert regression(np.array([0.5, 9.0, -0.5]), true) == {"ccc": 1, "pcc": 1, "rmse": 0, "sagr": 1}
    assert regression(np.zeros(1), np.array([np.nan])) == {}


def test_join_counts_each_sample_once():
    draws = np.random.default_rng(0)
    index, label, probabilities = np.arange(7), draws.integers(0, 3, 7), draws.random((7, 3))
    whole = Predictions(index, label, probabilities)
    parts = [Predictions(index[i], label[i], probabilities[i]) for i in ([5, 1, 3], [0, 2, 4, 6, 1])]
    joined = Predictions.join(parts)
    assert np.array_equal(joined.index, index) and np.array_equal(joined.probabilities, probabilities)
    assert joined.metrics() == whole.metrics() and joined.metrics()["samples"] == 7


def test_bootstrap():
    draws = np.random.default_rng(0)
    label = draws.integers(0, 2, 2000)

    def model(accuracy: float) -> Predictions:
        right = draws.random(2000) < accuracy
        return Predictions(np.arange(2000), label, np.eye(2)[np.where(right, label, 1 - label)])

    good, bad = model(0.9), model(0.8)
    test = paired_bootstrap(good, bad)
    assert test["difference"] == pytest.approx(good.metrics()["accuracy"] - bad.metrics()["accuracy"])
    assert 0.05 < test["low"] < test["difference"] < test["high"] < 0.15 and test["p_value"] < 0.001
    same = paired_bootstrap(good, good)
    assert same["difference"] == same["low"] == same["high"] == 0 and same["p_value"] == 1
    with pytest.raises(ValueError, match="same samples"):
        paired_bootstrap(good, Predictions(np.arange(3), label[:3], np.eye(2)[label[:3]]))

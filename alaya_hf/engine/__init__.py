"""One attention step: window, retrieved part and merge; prefill."""

"""What the tests share: builders of models and files, fakes, goldens, tolerances."""

"""Tables, figures and pages that show people what was measured."""

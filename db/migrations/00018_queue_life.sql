-- How long mail is tried may differ by transport.

-- +goose Up
ALTER TABLE config.transport ADD COLUMN queue_life text; -- as a setting has it: 12h, 14d; NULL: the setting queue_life

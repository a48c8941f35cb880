-- Secrets are sealed with a data key, which is wrapped for each member by its own key, or on a single node for that one. The package
-- secret does this; what reaches the server is sealed. A data key is made with the first secret, and another one takes its place when
-- somebody who could open it is no member any more.
-- Values that were stored in the clear before are read as they are, and sealed by the next commit that stores a secret. What a commit
-- replaces stays on the disk of the server until VACUUM and its log have gone over it: change such a secret.

-- +goose Up
ALTER TABLE config.secret ADD COLUMN key_id text; -- of the data key that seals value; NULL: value is in the clear

CREATE TABLE config.secret_key (
    key_id     text,
    public_key text,          -- the node's, as in config.node
    wrapped    bytea NOT NULL, -- the data key, for that node
    PRIMARY KEY (key_id, public_key)
);
COMMENT ON COLUMN config.secret_key.wrapped IS 'secret: sealed, and yet of no use in a history';

-- Commits that were trimmed come back with a backup's identity, which makes a single node one of a cluster. Only a node that was in
-- another one before has them from there.
DROP TRIGGER other_cluster ON node.position;
CREATE TRIGGER other_cluster AFTER UPDATE OF cluster_id ON node.position
    FOR EACH ROW WHEN (OLD.cluster_id <> '' AND OLD.cluster_id <> NEW.cluster_id) EXECUTE FUNCTION node.other_cluster();

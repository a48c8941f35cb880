// Package backup writes a node's backup and reads it back.
//
// A backup is one file, encrypted with a passphrase in the format of age (https://age-encryption.org/v1, scrypt recipient): "age -d"
// opens it without this program. Inside is a tar archive of readable files, in this order:
//
//	README                  what the rest is
//	manifest.json           Manifest: when, of which node, at which position, what tables with how many rows
//	node.toml               the node file
//	keys/…                  the key directory: node.key, ca.key (on a node that made a CA), certificates, identity.json, trust.json
//	tls/smtp.pem            key and certificate of STARTTLS
//	config/domain.jsonl …   each table of the database: a row a line, as a JSON object. Its folder is the schema: config, node
//	                        (the journal, and commits that were trimmed from the history before every member had them), and mail
//	                        (with the logs)
//
// The secrets in config/secret.jsonl stay sealed. keys/node.key unwraps their data key, which Write makes sure of; a restore without the
// identity seals them anew for the node that it makes.
//
// Write reads the database as of one moment. A file that is cut off or damaged anywhere is known by age's own seals, one whose archive
// was changed by hand by what the manifest says; Open reads all of it once before anything is done with it.
//
// Restore has two forms. Of a cluster that is lost, Single takes what the administrators entered, not who was in the cluster. Of a
// node whose cluster lives on, Identity brings that node back: the same CID, key, CA. Then it cannot know what it has promised or
// committed since the backup, so it comes back at position 0.0/0 like a node that joins: it has no vote, is never the master, whatever
// it was, and is never taken for in sync before the master in force has pushed to it. Its own commits that the master's history lacks are
// set aside in its journal by that push. The database comes first, in one transaction, and the keys after it, so that a restore that
// dies in between leaves a node that says so, and can be run again.
package backup

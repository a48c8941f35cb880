package main

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"mailproxy/cluster"
	"mailproxy/db"
	"mailproxy/internal/askpass"
	"mailproxy/tunnel"
)

// hints are the remedies, the first that fits counts. A test wants one for every sentinel of cluster.
var hints = []struct {
	err  error
	hint string
}{
	{cluster.ErrDaemonSilent, `it hangs, or the machine is overloaded: "systemctl restart mailproxy"`},
	{cluster.ErrNoDaemon, `start it: "systemctl start mailproxy"; "journalctl -u mailproxy" says why it ended`},
	{cluster.ErrNoDatabase, `the daemon starts it: "systemctl status mailproxy"; "pmgcm status" names what is wrong with it`},
	{cluster.ErrUnwell, `put right what is named above; then "pmgcm create" here, or "pmgcm join MASTER_IP" to enter a cluster`},
	{cluster.ErrNoCluster, `run "pmgcm create" here, or "pmgcm join MASTER_IP" to enter one`},
	{cluster.ErrClusterExists, `"pmgcm status" shows it; "pmgcm join-cmd" on its master prints the command for a new node; to enter another cluster, "pmgcm leave" here first`},
	{cluster.ErrWasMember, `to be its member again, run what "pmgcm join-cmd" on its master prints; to begin anew, stop the daemon, move the keys ` +
		`directory under the state directory away, and start it`},
	{cluster.ErrOtherJoin, `finish that one: run the same "pmgcm join" again, with a fresh token from "pmgcm join-cmd" on its master`},
	{cluster.ErrAlreadyMaster, `nothing to do; "pmgcm status" shows the nodes`},
	{cluster.ErrLocalMaster, `"pmgcm sync" without --master_ip pushes to every slave`},
	{cluster.ErrNotLetIn, `if "pmgcm status" on the master does not show this node: "pmgcm leave" here, which keeps configuration, journal and mail; ` +
		`then, to enter again, what "pmgcm join-cmd" on the master prints`},
	{cluster.ErrNoMajority, `bring a missing member back, or, where it is lost, run "pmgcm promote --force" here`},
	{cluster.ErrNotPromotable, `run "pmgcm promote" on another node`},
	{cluster.ErrJoining, `run the same "pmgcm join" again and wait for "joined"; after a restore, "pmgcm status" says what is to be done`},
	{cluster.ErrNoSuchNode, `"pmgcm status" shows the nodes and their CIDs`},
	{cluster.ErrDeleteSelf, `run "pmgcm promote" on the node that shall be master, then "pmgcm delete" there; where this is the only node: "pmgcm leave"`},
	{cluster.ErrMasterLeaves, `run "pmgcm promote" on the node that shall be master, then "pmgcm leave" here`},
	{cluster.ErrKeyNotConfirmed, `answer yes if it is the fingerprint that "pmgcm join-cmd" prints on the master`},
	{cluster.ErrNotConfirmed, `answer yes, or give --yes`},
	{cluster.ErrNotMember, `"pmgcm status" shows the members' addresses; "pmgcm join" enters another cluster`},
	{cluster.ErrHostNotMaster, `"pmgcm status" there shows the master`},
	{cluster.ErrNotMaster, `run it on the master; "pmgcm status" shows which node that is`},
	{cluster.ErrPeerUnreachable, `"pmgcm status" says since when; see that its daemon runs and its tunnel port is open`},
	{cluster.ErrNotInSync, `"pmgcm status" shows who is behind and why`},
	{cluster.ErrWouldOverwrite, `"pmgcm sync --pull" overwrites it, and keeps it in the journal`},
	{cluster.ErrMasterAway, `wait until it is back; or, where it is lost, run "pmgcm promote" on a node that is in sync`},
	{cluster.ErrMasterAnswers, `"pmgcm sync --pull" without a CID`},
	{cluster.ErrEntryClosed, `"pmgcm journal list --all" shows how`},
	{cluster.ErrNotEntered, `make it anew where it is still wanted ("pmgcm journal show N"); then "pmgcm journal drop N --reason TEXT"`},
	{cluster.ErrRefused, `"pmgcm journal diff N" shows what it would change today`},
	{cluster.ErrCAInUse, `"pmgcm ca add" first; nodes in reach renew within a minute ("pmgcm ca show"); --force cuts off the others, which must then be deleted and join again`},
	{cluster.ErrNoSuchCA, `"pmgcm ca show" shows the fingerprints`},
	{cluster.ErrNoDataKey, dataKeyHint},
	{db.ErrNoDataKey, dataKeyHint},
	{cluster.ErrNoSuchEntry, `"pmgcm journal list" shows what there is`},
	{cluster.ErrTargetNotMaster, `give the master's address; "pmgcm status" on any member shows it, "pmgcm join-cmd" on it prints the command`},
	{cluster.ErrTokenUnknown, `run "pmgcm join-cmd" on the master and paste the line that it prints`},
	{cluster.ErrTokenUsed, `a token is good for one node: run "pmgcm join-cmd" on the master again`},
	{cluster.ErrTokenExpired, `run "pmgcm join-cmd" on the master again, and the line that it prints within the hour`},
	{cluster.ErrWrongPassword, `it is root's on the master that is wanted; or run "pmgcm join-cmd" there and paste the line that it prints`},
	{cluster.ErrPasswordsOff, `run "pmgcm join-cmd" on the master and paste the line that it prints; or "mailproxy setting set join_password yes" there`},
	{cluster.ErrPasswordUnchecked, `on the master: "systemctl enable --now mailproxy-pam.socket"; or "pmgcm join-cmd", and paste the line that it prints`},
	{cluster.ErrManyPasswords, `wait so long; or run "pmgcm join-cmd" on the master and paste the line that it prints`},
	{cluster.ErrKeyRevoked, `to enter again as a new node, stop the daemon, remove the keys directory under the state directory, and join`},
	{cluster.ErrNameTaken, `take another name (before a join: in this node's file, then restart the daemon), or "pmgcm delete CID" the node that has it`},
	{cluster.ErrAddressTaken, `take another address (before a join: in this node's file, then restart the daemon), or "pmgcm delete CID" the node that has it`},
	{cluster.ErrGhost, `if it was installed again: "pmgcm delete CID" on the master, then join again`},
	{cluster.ErrOlderVersion, `upgrade mailproxy here, restart the daemon, then join again`},
	{cluster.ErrBadRequest, `check name and address in this node's file`},
	{cluster.ErrMasterAlone, `"pmgcm status" on the master says why; then run the same command again`},
	{cluster.ErrTooManyJoins, `wait a minute, then run the same command again`},
	{cluster.ErrJoinFailed, `the master's log says why: "journalctl -u mailproxy" there`},
	{cluster.ErrFingerprint, `compare with the line that "pmgcm join-cmd" prints on the master; if it differs, something else answers at that address`},
	{cluster.ErrJoinUnreachable, `see that the daemon runs there and that its tunnel port is open to this node`},
	{cluster.ErrNoFirstPush, `see that each node's tunnel port can be reached by the other, then run the same "pmgcm join" again`},
	{db.ErrStale, `a promote is under way or was not finished; "pmgcm status" shows the epochs`},
	{db.ErrNoLease, `bring the other nodes back ("pmgcm status"); where they are lost for good: "pmgcm promote --force" on the master, then "pmgcm delete CID" each`},
	{db.ErrNoSchema, `the daemon sets it up when it starts: "systemctl restart mailproxy"; "pmgcm status" names what is wrong`},
	{db.ErrDiskFull, `nothing was changed; "df -h" shows the disk that is full: make room, then run it again`},
	{db.ErrInDoubt, `once the database answers, "mailproxy config history" shows whether that configuration is there`},
	{db.ErrDisconnected, `run it again; "pmgcm status" says whether the database is there`},
	{askpass.ErrReadable, `chmod 600 the file`},
	{tunnel.ErrKeyMode, `chmod 600 the key file`},
	{tunnel.ErrBadKey, `put the key file back from a backup; "pmgcm status" says what else can be done`},
	{fs.ErrPermission, `run it as root`},
	{fs.ErrNotExist, `make the node file: "mailproxy init --name NAME --address IP", or name another with --config`},
	{context.Canceled, `it was interrupted; every command can be run again`},
}

const dataKeyHint = `nothing was changed; put keys/node.key back on the master from a backup and restart the daemon; or "pmgcm promote" a node on which ` +
	`"mailproxy secret list" says sealed; where there is none, "mailproxy secret remove" what is unreadable, and set it again`

// hint gives the remedy for an error; empty where there is none.
func hint(err error) string {
	var usage *usageError
	if errors.As(err, &usage) {
		return "pmgcm --help"
	}
	if e, ok := errors.AsType[*cluster.NotMasterError](err); ok && e.Away {
		return `run it on the master when that is back; if it is lost: "pmgcm promote" here first, then this again`
	}
	if e, ok := errors.AsType[*cluster.NoMajorityError](err); ok && e.Alone {
		return `no other node answers here: see to this host's network first, it may be this node that is cut off; only where the others are lost: ` +
			`"pmgcm promote --force" here`
	}
	for _, h := range hints {
		if !errors.Is(err, h.err) || h.err == fs.ErrPermission && os.Geteuid() == 0 {
			continue
		}
		return h.hint
	}
	return ""
}

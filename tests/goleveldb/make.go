// Creates the fixtures in this folder: indexes as a Go minikeyvalue leaves them, written by goleveldb,
// and for each a text of the records that goleveldb reads in it. A line holds the percent-encoded key,
// a tab and the record.
//
//	apt-get install golang-go golang-github-syndtr-goleveldb-dev
//	GO111MODULE=off GOPATH=/usr/share/gocode GOFLAGS= go run make.go .
//
//	killed  tables on several levels, two logs, never closed
//	odd     a log, records that do not decode
//	empty   opened and closed, nothing written
//
// goleveldb compacts in the background, so the file names in killed vary from run to run. The tests use
// some of these names.
//
// `go run make.go random SEED DIR` writes DIR/db and DIR/db.txt with a random history.
package main

import (
	"crypto/md5"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/syndtr/goleveldb/leveldb"
	"github.com/syndtr/goleveldb/leveldb/opt"
	"github.com/syndtr/goleveldb/leveldb/util"
)

// The Go master uses the default options. Smaller files have the same format and keep the fixtures small.
var small = &opt.Options{WriteBuffer: 8 << 10, CompactionTableSize: 4 << 10, CompactionTotalSize: 12 << 10}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func volumes(n int) string {
	text := ""
	for i := 0; i < 3; i++ {
		text += fmt.Sprintf(",localhost:%d/sv%02X", 3001+(n+i)%5, n%10)
	}
	return text[1:]
}

func record(n int) string {
	hash := fmt.Sprintf("HASH%x", md5.Sum([]byte(strconv.Itoa(n))))
	switch n % 9 {
	case 0:
		return "DELETED" + hash + volumes(n)
	case 1:
		return "DELETED" + volumes(n)
	case 2:
		return volumes(n)
	case 3:
		return "INIT" + volumes(n)
	case 4:
		return "INITDELETED" + volumes(n)
	}
	return hash + volumes(n)
}

func key(n int) []byte {
	switch n % 7 {
	case 0:
		return []byte(fmt.Sprintf("/wehave-%d", n))
	case 1:
		return []byte{'/', 0xff, 0, byte(n), '\n', byte(n >> 8), 0xc3}
	case 2:
		return []byte(fmt.Sprintf("/日本語/キー/%d", n))
	}
	return []byte(fmt.Sprintf("/some/folder/%05d", n))
}

func encoded(key []byte) string {
	text := ""
	for _, b := range key {
		if b == '/' || b == '-' || b == '.' || b == '_' || b == '~' ||
			b >= '0' && b <= '9' || b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' {
			text += string(rune(b))
		} else {
			text += fmt.Sprintf("%%%02X", b)
		}
	}
	return text
}

func copyFile(from, to string) {
	text, err := os.ReadFile(from)
	check(err)
	check(os.WriteFile(to, text, 0644))
}

func copyFolder(from, to string) {
	check(os.RemoveAll(to))
	check(os.Mkdir(to, 0755))
	files, err := filepath.Glob(filepath.Join(from, "*"))
	check(err)
	for _, name := range files {
		copyFile(name, filepath.Join(to, filepath.Base(name)))
	}
}

// Writes the records of a folder to a text file. Reads a copy, because opening an index changes it.
func describe(dir string) {
	copied := dir + ".copy"
	copyFolder(dir, copied)
	db, err := leveldb.OpenFile(copied, &opt.Options{ErrorIfMissing: true})
	check(err)
	out, err := os.Create(dir + ".txt")
	check(err)
	rows := db.NewIterator(nil, nil)
	for rows.Next() {
		fmt.Fprintf(out, "%s\t%s\n", encoded(rows.Key()), rows.Value())
	}
	check(rows.Error())
	rows.Release()
	check(out.Close())
	check(db.Close())
	check(os.RemoveAll(copied))
}

func put(db *leveldb.DB, k []byte, value string) { check(db.Put(k, []byte(value), nil)) }

func killed(dir string) {
	db, err := leveldb.OpenFile(dir, small)
	check(err)
	for n := 0; n < 500; n++ {
		put(db, key(n), "INIT"+volumes(n))
		put(db, key(n), record(n))
	}
	check(db.Close())
	db, err = leveldb.OpenFile(dir, small)
	check(err)
	for n := 0; n < 500; n += 5 {
		check(db.Delete(key(n), nil))
	}
	for n := 0; n < 500; n += 15 {
		put(db, key(n), record(n+5))
	}
	check(db.CompactRange(util.Range{}))
	// Tables with overlapping key ranges.
	for n := 0; n < 90; n++ {
		put(db, key(n*5), record(n))
		check(db.Delete(key(n*5+2), nil))
	}
	check(db.Close())
	db, err = leveldb.OpenFile(dir, nil)
	check(err)
	for n := 300; n < 420; n++ {
		put(db, key(n), record(n+7))
	}
	// This batch spans more than two log blocks of 32 KiB.
	batch := new(leveldb.Batch)
	for n := 500; n < 740; n++ {
		batch.Put(key(n), []byte(record(n)))
	}
	many := ""
	for n := 0; n < 50; n++ {
		many += "," + volumes(n)
	}
	batch.Put([]byte("/many"), []byte(many[1:]))
	batch.Delete(key(301))
	check(db.Write(batch, nil))
	put(db, []byte("/last"), record(5))
	os.Exit(0)
}

// A master killed while it flushes its memtable leaves two logs. The second log here comes from a master
// that continued in a copy of the folder.
func secondLog(dir string) {
	copied := dir + ".copy"
	copyFolder(dir, copied)
	db, err := leveldb.OpenFile(copied, nil)
	check(err)
	check(db.Delete([]byte("/last"), nil))
	put(db, []byte("/very-last"), record(6))
	put(db, key(501), record(7))
	check(db.Close())
	logs, err := filepath.Glob(filepath.Join(copied, "*.log"))
	check(err)
	copyFile(logs[0], filepath.Join(dir, filepath.Base(logs[0])))
	check(os.RemoveAll(copied))
}

func odd(dir string) {
	db, err := leveldb.OpenFile(dir, nil)
	check(err)
	put(db, []byte("/good"), record(5))
	for n := 0; n < 120; n++ {
		put(db, key(n), fmt.Sprintf("HASH%d", n))
	}
	put(db, []byte("/empty"), "")
	put(db, []byte("/unlinked"), record(0))
	check(db.Close())
}

func random(dir string, seed int64) {
	dice := rand.New(rand.NewSource(seed))
	for lives := dice.Intn(4); lives >= 0; lives-- {
		o := &opt.Options{
			WriteBuffer:          1 << (10 + dice.Intn(13)),
			CompactionTableSize:  1 << (10 + dice.Intn(12)),
			CompactionTotalSize:  1 << (12 + dice.Intn(12)),
			BlockSize:            1 << (6 + dice.Intn(8)),
			BlockRestartInterval: 1 + dice.Intn(20),
			Compression:          opt.Compression(dice.Intn(3)),
		}
		db, err := leveldb.OpenFile(dir, o)
		check(err)
		keys := 1 + dice.Intn(3000)
		for writes := dice.Intn(20000); writes > 0; writes-- {
			n := dice.Intn(keys)
			switch dice.Intn(10) {
			case 0, 1:
				check(db.Delete(key(n), nil))
			case 2:
				batch := new(leveldb.Batch)
				for i := dice.Intn(300); i > 0; i-- {
					batch.Put(key(dice.Intn(keys)), []byte(record(dice.Intn(99999))))
					batch.Delete(key(dice.Intn(keys)))
				}
				check(db.Write(batch, nil))
				writes -= 300
			default:
				put(db, key(n), record(dice.Intn(99999)))
			}
		}
		if dice.Intn(3) == 0 {
			check(db.CompactRange(util.Range{}))
		}
		if dice.Intn(3) > 0 {
			check(db.Close())
		} else if lives == 0 {
			os.Exit(0)
		} else {
			check(db.Close())
		}
	}
}

func main() {
	switch {
	case len(os.Args) == 4 && os.Args[1] == "write":
		switch os.Args[2] {
		case "killed":
			killed(os.Args[3])
		case "odd":
			odd(os.Args[3])
		case "empty":
			db, err := leveldb.OpenFile(os.Args[3], nil)
			check(err)
			check(db.Close())
		default:
			seed, err := strconv.ParseInt(os.Args[2], 10, 64)
			check(err)
			random(os.Args[3], seed)
		}
	case len(os.Args) == 4 && os.Args[1] == "random":
		dir := filepath.Join(os.Args[3], "db")
		write(os.Args[2], dir)
		describe(dir)
	case len(os.Args) == 2:
		for _, name := range []string{"killed", "odd", "empty"} {
			dir := filepath.Join(os.Args[1], name)
			write(name, dir)
			if name == "killed" {
				secondLog(dir)
			}
			describe(dir)
		}
	}
}

// Writes in another process, which may exit without closing the index.
func write(what, dir string) {
	check(os.RemoveAll(dir))
	check(os.MkdirAll(filepath.Dir(dir), 0755))
	program, err := os.Executable()
	check(err)
	command := exec.Command(program, "write", what, dir)
	command.Stderr = os.Stderr
	check(command.Run())
	check(os.RemoveAll(filepath.Join(dir, "LOG")))
}

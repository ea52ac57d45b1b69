// formats.h - what the readers of tokenizer files share.  Inside tokenizer/ only.
#pragma once
#include <nlohmann/json.hpp>
#include "tokenizer.h"

// A namespace, because programs have their own read_file and the like, and the linker would pick one of the two.
namespace formats {

// GPT-2 writes a byte as a letter, so that any byte string is printable text: see `pieces` in tokenizer.h.
std::string bytes_to_letters(std::string_view bytes);
bool letters_to_bytes(std::string_view letters, std::string *bytes);    // false: not such a letter

// JSON with errors of one line: `where` names the file, `field` the place in it.
nlohmann::json parse_json(std::string_view text, const std::string &where);
const nlohmann::json &json_field(const nlohmann::json &object, const char *field, const std::string &where);
std::string json_string(const nlohmann::json &v, const char *field, const std::string &where);
bool json_bool(const nlohmann::json &v, const char *field, const std::string &where);
int json_int(const nlohmann::json &v, const char *field, const std::string &where);    // fits an int, no fraction
const nlohmann::json &json_array(const nlohmann::json &v, const char *field, const std::string &where);

std::string shown(std::string_view text);    // for an error line: no control characters, not too long

std::string read_file(const std::string &path);
bool file_exists(const std::string &path);

// import.cpp, for the readers of folders in import_hf.cpp
void add_token(Tokenizer &t, const AddedToken &token, TokenType type, const std::string &where);
void add_llama3_tokens(Tokenizer &t, const std::string &where);
Tokenizer import_file(const std::string &path);
int byte_of_name(const std::string &name);              // "<0x0A>" -> 10, anything else -> -1
std::string spaces_of_marks(std::string_view piece);    // U+2581 -> space
// import_hf.cpp
Tokenizer import_tokenizer_json(std::string_view text, const std::string &where);
Tokenizer import_folder(const std::string &path);

}    // namespace formats
